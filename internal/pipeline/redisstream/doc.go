// Package redisstream is one member's view of one Redis stream: a consumer of a consumer group, what it holds, and how
// it gives that up.
//
// An entry that Redis has delivered stays in the group's pending list until somebody acknowledges it. A Member reads
// first what was pending for its own name, then takes over what dead members left, then reads new entries. What it was
// given and has not yet settled it holds; Refresh keeps held entries from looking abandoned.
//
//	R1: an entry leaves the pending list only by Ack, or because Redis no longer has it, which is counted.
//	R2: a Member never hands out an entry that it already holds, however often it reads its pending list again.
//	R3: Refresh never takes an entry back from another member: it checks the holder and refreshes in one script.
//	R4: a consumer is removed only when nothing is pending for it, checked and done in one script. XGROUP DELCONSUMER
//	    alone throws the consumer's pending entries away.
//	R5: after Release other members can take this member's entries at once, without waiting for them to look abandoned.
//	R6: a group that vanished is created again where nothing this member has not seen is skipped.
//	R7: nothing that was read from a stream is settled in another that has its name: after a loss of Redis' data, or DEL,
//	    ids mean other entries.
//	R8: with Exclusive, a member that has lost its lease reads nothing and acknowledges nothing: both are checked in the
//	    script that does it. What it has not written yet it drops; only a write that was under way can still land.
package redisstream
