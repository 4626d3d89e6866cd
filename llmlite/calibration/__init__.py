"""What guides pruning and calibrated quantization: calibration text as token windows, and statistics taken block by block."""
