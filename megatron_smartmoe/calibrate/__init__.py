"""Measure a machine, fit lines to the measurements, write its cluster file: `smartmoe calibrate`."""
