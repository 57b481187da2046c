"""What one machine costs, from what was measured on it: `smartmoe calibrate` without the measuring."""
