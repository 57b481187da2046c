"""The machine: counts, and what moves because of them. torch only; process groups are passed in."""
