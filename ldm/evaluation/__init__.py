"""How good pictures are: drawn scenes judged against their prompts, and distances between sets of pictures."""
