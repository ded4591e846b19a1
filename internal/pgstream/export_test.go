package pgstream

// MaintainWithRing is Maintain with ledgers that move on to the next ring at any size, for tests of what a rotation must keep.
var MaintainWithRing = maintain
