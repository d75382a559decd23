"""Images: files and their decoding, resizing and masks, control images."""
