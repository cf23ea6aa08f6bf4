"""Pictures that explain Mask R-CNN on a user's image; ``explain`` makes all of them."""
