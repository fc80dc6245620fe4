"""Model cards, and results in the format of the Hugging Face hub."""
