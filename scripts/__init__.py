"""Commands for people: they read arguments and call the other packages, which never import them."""
