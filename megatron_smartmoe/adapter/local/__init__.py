"""What replaces TransformerEngine and apex where they are not installed: attention, norm and Adam in plain torch."""
