"""Runs any LightningModule: settings, folders, devices, checkpoints, loggers, sweeps. Knows no images."""
