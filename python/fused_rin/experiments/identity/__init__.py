"""Does a pull towards the identity explain what the RIN learns? An experiment that the paper does not have."""
