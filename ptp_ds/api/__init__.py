"""What a Python program or a notebook calls: train a prompt, ask an adapter. See ptp_ds.train and ptp_ds.Predictor."""
