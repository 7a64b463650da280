"""What skipping costs in quality: divergence, perplexity and tasks under every policy kind, through the real engines."""
