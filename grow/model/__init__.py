"""Models in memory: the grown MLP, loading, the loss, the interpolation coefficient α."""
