"""Images in and out, in bands: PNG, TIFF, JPEG, WebP."""
