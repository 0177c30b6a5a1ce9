"""Loading and running the models; knows nothing of TorchServe."""
