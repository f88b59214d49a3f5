"""The generated cardiac phantom."""
