"""What skipping costs and saves: scores of texts and tasks, decode times, frontier, profile, pictures, report."""
