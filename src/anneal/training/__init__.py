"""Training one member: LightningModule, LightningDataModule, callbacks and loggers."""
