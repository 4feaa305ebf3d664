"""The whole family trained on the quickstart, on equal terms, by the commands a person types."""
