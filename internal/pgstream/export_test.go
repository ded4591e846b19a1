package pgstream

// MaintainWithRing is Maintain with ledgers that move on to the next ring at any size, for tests of what a rotation must keep.
var MaintainWithRing = maintain

// Fetches says whether the consumer's next claim will be made and read by two transactions.
func Fetches(c *Consumer) bool {
	return c.backlog.Load() && c.lane.Load() != 0 && c.facts.Load().claimSQL != ""
}
