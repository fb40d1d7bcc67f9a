"""Large images, tile by tile or patch by patch."""
