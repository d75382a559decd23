"""Schedulers of diffusers as tables of matrices that any batch can share."""
