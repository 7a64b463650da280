"""DASH's training side (torch): the Markov decision process, its networks, the compensation, and their training."""
