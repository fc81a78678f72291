//! The little linear algebra that a forecast needs, on matrices of at most some dozen rows. Knows nothing of loads.

/// Rounds of rotations; the off-diagonal falls quadratically, so that few are ever needed.
const ROUNDS: usize = 30;

/// Sum of products.
pub(super) fn dot(one: &[f64], other: &[f64]) -> f64 {
    // Four sums at once: the order of additions is fixed, and the processor need not wait for each.
    let (heads, tail) = one.as_chunks::<4>();
    let (others, rest) = other.as_chunks::<4>();
    let mut sums = [0.0; 4];
    for (one, other) in heads.iter().zip(others) {
        for (sum, (one, other)) in sums.iter_mut().zip(one.iter().zip(other)) {
            *sum += one * other;
        }
    }
    sums.iter().sum::<f64>() + tail.iter().zip(rest).map(|(one, other)| one * other).sum::<f64>()
}

/// Solves a small system with a positive diagonal.
pub(super) fn eliminate(mut matrix: Vec<Vec<f64>>, mut right: Vec<f64>) -> Vec<f64> {
    let size = right.len();
    for pivot in 0..size {
        for row in pivot + 1..size {
            let factor = matrix[row][pivot] / matrix[pivot][pivot];
            let above = matrix[pivot].clone();
            for (entry, above) in matrix[row].iter_mut().zip(above) {
                *entry -= factor * above;
            }
            right[row] -= factor * right[pivot];
        }
    }
    let mut solution = vec![0.0; size];
    for row in (0..size).rev() {
        let known: f64 = (row + 1..size).map(|at| matrix[row][at] * solution[at]).sum();
        solution[row] = (right[row] - known) / matrix[row][row];
    }
    solution
}

/// Eigenvalues of a symmetric matrix and, by row, their vectors, the largest first (Jacobi's rotations).
pub(super) fn eigen(mut matrix: Vec<Vec<f64>>) -> Vec<(f64, Vec<f64>)> {
    let size = matrix.len();
    let unit = |at: usize| (0..size).map(|other| if at == other { 1.0 } else { 0.0 }).collect();
    let mut vectors: Vec<Vec<f64>> = (0..size).map(unit).collect();
    let scale: f64 = (0..size).map(|at| matrix[at][at].abs()).fold(0.0, f64::max);
    for _ in 0..ROUNDS {
        let mut rotated = false;
        for one in 0..size {
            for other in one + 1..size {
                if matrix[one][other].abs() <= 1e-14 * scale {
                    continue;
                }
                rotated = true;
                rotate(&mut matrix, &mut vectors, one, other);
            }
        }
        if !rotated {
            break;
        }
    }
    let mut pairs: Vec<(f64, Vec<f64>)> =
        vectors.into_iter().enumerate().map(|(at, row)| (matrix[at][at], row)).collect();
    pairs.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    pairs
}

/// Makes the entry of two rows 0.
fn rotate(matrix: &mut [Vec<f64>], vectors: &mut [Vec<f64>], one: usize, other: usize) {
    let theta = (matrix[other][other] - matrix[one][one]) / (2.0 * matrix[one][other]);
    let tangent = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
    let cosine = 1.0 / (tangent * tangent + 1.0).sqrt();
    let sine = tangent * cosine;
    for row in matrix.iter_mut() {
        let (first, second) = (row[one], row[other]);
        row[one] = cosine * first - sine * second;
        row[other] = sine * first + cosine * second;
    }
    for rows in [matrix, vectors] {
        for at in 0..rows[one].len() {
            let (first, second) = (rows[one][at], rows[other][at]);
            rows[one][at] = cosine * first - sine * second;
            rows[other][at] = sine * first + cosine * second;
        }
    }
}
