"""Any dataset as rows: columns, decoding of images, workers, fingerprints. Knows ``datasets`` and nothing above it."""
