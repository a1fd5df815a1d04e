"""Other projects' RetinaNets: their files to our checkpoints, and back."""
