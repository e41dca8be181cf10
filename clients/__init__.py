"""What a client does with one message: the ClientApp, its resident trainer, local training."""
