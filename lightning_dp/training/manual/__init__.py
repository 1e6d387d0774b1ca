"""Manual optimization: private steps where ``training_step`` itself asks for gradients and takes the steps."""
