"""Small models trained in this repository, which come along as its examples."""
