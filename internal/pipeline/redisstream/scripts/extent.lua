-- extent.lua: how far a stream reaches, and whether it still has some entries, at one moment.
-- KEYS[1] stream  ARGV[…] ids
-- Returns {greatest id, entries ever added, length, first id, greatest id deleted, newest entry, entry of each id…}. Where
-- there is no entry it is nil; what Redis does not tell before 7 is -1 or empty.
local s = redis.call('XINFO', 'STREAM', KEYS[1])
local info = {}
for i = 1, #s, 2 do info[s[i]] = s[i + 1] end
local answer = {
  info['last-generated-id'], info['entries-added'] or -1, info.length,
  info['recorded-first-entry-id'] or '', info['max-deleted-entry-id'] or '', info['last-entry'] or false,
}
for i = 1, #ARGV do
  answer[#answer + 1] = redis.call('XRANGE', KEYS[1], ARGV[i], ARGV[i])[1] or false
end
return answer
