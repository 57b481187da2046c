"""Long runs that look for what a short test cannot show: leaks, drift, damage, and what a fault does to training."""
