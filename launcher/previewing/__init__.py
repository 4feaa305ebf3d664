"""What `preview` shows."""
