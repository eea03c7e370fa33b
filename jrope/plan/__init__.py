"""Planning: what a model needs on devices that need not be here, by formulas alone."""
