"""`smartmoe report`: a run, or a routing trace, as one HTML page that opens from disk."""
