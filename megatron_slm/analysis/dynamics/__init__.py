"""Follow the loss of each token over training (Rho-1, appendix B.1)."""
