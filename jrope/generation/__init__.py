"""Generation: a request checked, prompts prefilled, tokens drawn in a loop."""
