"""What Secateur does to single modules: slice them, mask them, spell their attention out, rewrite their reshapes."""
