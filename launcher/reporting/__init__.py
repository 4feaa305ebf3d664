"""What an evaluation shows a person: the HTML report and the scores on a release's card."""
