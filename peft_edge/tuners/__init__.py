"""PEFT tuners for convolutional networks."""
