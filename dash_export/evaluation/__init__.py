"""What skipping costs in quality: divergence, perplexity and tasks under every policy kind, on real engines."""
