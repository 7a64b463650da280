"""DASH's training side (torch): the Markov decision process, its network, the bypasses, and their training."""
