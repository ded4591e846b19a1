package pipeline

import "sync"

// seenKeys remembers which keys came by lately, in bounded memory. It may take a new key for one that it has seen, but
// never a seen key for a new one, until that is forgotten: after between one and two times seenGeneration further keys.
//
// It is a Bloom filter in two generations: keys are added to the younger and looked up in both, and when the younger is
// full it becomes the elder. All bits of a key lie in one block of 64 bytes, so a look costs one cache miss.
type seenKeys struct {
	mu             sync.Mutex
	younger, elder []uint64
	count          int // keys in the younger
}

// Of seenKeys: eight bits per key and four of them set mistake about three new keys of a hundred for seen ones.
const (
	seenGeneration = 2 << 20
	seenWords      = seenGeneration * 8 / 64
	seenBits       = 4
	seenBlockWords = 8
)

func newSeenKeys() *seenKeys {
	return &seenKeys{younger: make([]uint64, seenWords), elder: make([]uint64, seenWords)}
}

// add remembers the hash of a key and reports whether it may have been there. The caller holds mu.
func (s *seenKeys) add(hash uint64) bool {
	block := int(hash>>40) % (seenWords / seenBlockWords) * seenBlockWords
	inYounger, inElder := true, true
	bits := hash * 0x9e3779b97f4a7c15 >> 16 // the upper ones of a product are the best mixed
	for range seenBits {
		word, mask := block+int(bits>>6&(seenBlockWords-1)), uint64(1)<<(bits&63)
		inYounger = inYounger && s.younger[word]&mask != 0
		inElder = inElder && s.elder[word]&mask != 0
		s.younger[word] |= mask
		bits >>= 12
	}
	if !inYounger {
		s.count++
		if s.count == seenGeneration {
			s.younger, s.elder, s.count = s.elder, s.younger, 0
			clear(s.younger)
		}
	}
	return inYounger || inElder
}
