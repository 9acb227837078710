"""From text to a souped expert by one gin file: stages, run in the order they need."""
