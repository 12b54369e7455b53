"""stage=explore: the page in which a model can be touched, and the server behind it."""
