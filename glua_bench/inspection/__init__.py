"""Check data: errors, outliers, fingerprints, and export to nnU-Net."""
