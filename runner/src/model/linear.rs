//! Matrices as checkpoints store them, applied by `berth-kernels`: `y = W x`, float32 activations over the stored
//! weights. A checkpoint's tensor is asked for by its published name and the shape that `config.json` implies.

use berth_kernels::{Checkpoint, Linear, StoredMatrix};

use crate::error::{ModelError, StepError};

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

    /// The vector `name`, widened to float32.
    pub(crate) fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>, ModelError> {
        let vector = self.0.vector(name)?;
        if vector.len() == len {
            return Ok(vector);
        }
        Err(ModelError::Length { tensor: name.to_owned(), found: vector.len(), expected: len })
    }
}

/// `x` ([rows × cols]) through `matrix`: [rows × matrix.rows()].
pub(crate) fn apply(matrix: &Linear, x: &[f32], rows: usize) -> Result<Vec<f32>, StepError> {
    let mut y = vec![0.0; rows * matrix.rows()];
    matrix.apply(x, &mut y)?;
    Ok(y)
}
