"""What a run is: its configuration, folder, data, model, log."""
