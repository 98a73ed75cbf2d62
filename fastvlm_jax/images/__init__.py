"""Image headers, decoding, resizing, augmentation, and the sizes that images are resized to."""
