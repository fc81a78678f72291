//! Matrices as checkpoints store them, applied by `berth-kernels`: `y = W x`, float32 activations over the stored
//! weights. A checkpoint's tensor is asked for by its published name and the shape that `config.json` implies.

use berth_kernels::{Checkpoint, Linear, StoredMatrix};

use crate::{
    error::{ModelError, StepError},
    num::usize_of,
};

/// A checkpoint that a model is loaded from.
#[derive(Clone, Copy)]
pub(crate) struct Source<'a>(pub(crate) &'a Checkpoint);

impl Source<'_> {
    /// The stored matrix `name`, [rows × cols].
    pub(crate) fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<StoredMatrix, ModelError> {
        Ok(self.0.matrix(name, rows, cols)?)
    }

    /// The same, packed for products.
    pub(crate) fn linear(&self, name: &str, rows: usize, cols: usize) -> Result<Linear, ModelError> {
        Linear::from_stored(&self.matrix(name, rows, cols)?)
            .map_err(|source| ModelError::Pack { tensor: name.to_owned(), source })
    }

    /// `parts` matrices that the checkpoint stores one below the other as `name`, [parts · rows × cols].
    pub(crate) fn stacked(
        &self,
        name: &str,
        parts: usize,
        rows: usize,
        cols: usize,
    ) -> Result<Vec<Linear>, ModelError> {
        let stored = self.matrix(name, parts * rows, cols)?;
        let part = |part: usize| stored.slice_rows(part * rows, rows).and_then(|part| Linear::from_stored(&part));
        let pack = |at| part(at).map_err(|source| ModelError::Pack { tensor: name.to_owned(), source });
        (0..parts).map(pack).collect()
    }

    /// The whole numbers of `name`, each below `bound`: [rows × cols].
    pub(crate) fn table(&self, name: &str, rows: usize, cols: usize, bound: usize) -> Result<Vec<u32>, ModelError> {
        let shape = self.0.shape(name)?;
        if shape != [rows, cols] {
            let problem = format!("has shape {shape:?}, config.json implies [{rows}, {cols}]");
            return Err(ModelError::Table { tensor: name.to_owned(), problem });
        }
        let entry = |value: i64| {
            u32::try_from(value).ok().filter(|id| usize_of(*id) < bound).ok_or_else(|| {
                let problem = format!("names expert {value}, the model has {bound}");
                ModelError::Table { tensor: name.to_owned(), problem }
            })
        };
        self.0.ints(name)?.into_iter().map(entry).collect()
    }

    /// The vector `name`, widened to float32.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let vector = self.0.vector(name)?;
        if vector.len() == len {
            return Ok(vector);
        }
        Err(ModelError::Length { tensor: name.to_owned(), found: vector.len(), expected: len })
    }
}

/// Appends row `row` of a stored matrix to `out`, widened to float32.
pub(crate) fn embed(matrix: &StoredMatrix, row: usize, out: &mut Vec<f32>) {
    out.extend((0..matrix.cols()).map(|col| matrix.code_at(row, col) * matrix.scale_at(row, col)));
}

/// `x` ([rows × cols]) through `matrix`: [rows × matrix.rows()].
pub(crate) fn apply(matrix: &Linear, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
    let mut y = vec![0.0; rows * matrix.rows()];
    matrix.apply(x, &mut y)?;
    Ok(y)
}
