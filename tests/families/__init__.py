"""What every family of models must keep."""
