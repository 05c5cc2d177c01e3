"""Everything between a record and tensors: the only maker of strings and pixels that reach a model."""
